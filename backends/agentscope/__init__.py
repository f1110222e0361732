"""The training sandbox of AgentScope Runtime, on this project: the same classes, values and names."""
