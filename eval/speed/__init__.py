"""What a cache does to the time: prefill and decode steps beside other libraries, long decoding, where a step goes."""
