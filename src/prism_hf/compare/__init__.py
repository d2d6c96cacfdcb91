"""Several methods under one protocol, and the page about them. What needs torch is imported from its module."""

from .methods import Method, under_one_protocol
