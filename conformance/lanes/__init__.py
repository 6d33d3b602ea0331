"""Lanes: where a kernel can be run. One module each, and the worker process they share."""
