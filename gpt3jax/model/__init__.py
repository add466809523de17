"""The network and its loss."""
