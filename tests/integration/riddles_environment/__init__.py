"""An environment as somebody else would bring it."""
