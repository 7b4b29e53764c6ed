"""What a cache does to the bytes: by arithmetic, in the buffers, users that fit on a card, users until a process is killed."""
