"""The loss and the gradient of a batch, accumulated or through pipeline stages."""
