"""Public conformance kits for backends, environments and queues."""
