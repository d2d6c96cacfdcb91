"""Several methods under one protocol, and the page about them."""
