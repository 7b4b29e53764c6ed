"""Many requests at once over one pool of blocks: what runs when (plan), and the steps that run it (engine)."""
