"""Comparison of methods under one protocol, and its results page; import torch-dependent names from their modules."""

from .methods import Method, under_one_protocol
