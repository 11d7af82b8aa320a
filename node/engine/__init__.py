"""What runs on the device: the device thread, loaded stages and sampling. The only part of the node that sees torch."""
