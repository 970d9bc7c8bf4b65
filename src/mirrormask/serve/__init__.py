"""A compiled model behind HTTP: the Open Inference Protocol (KServe v2), requests put together, metrics."""
