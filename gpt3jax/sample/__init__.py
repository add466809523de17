"""Text from a checkpoint: the network with a cache, the choice of tokens, a command, a server."""
