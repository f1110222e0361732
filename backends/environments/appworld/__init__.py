"""AppWorld: tasks on simulated everyday apps, done by writing Python; what runs inside its sandboxes."""
