"""Everything across a process boundary: sandboxes, the environments inside them, trainers queues."""
