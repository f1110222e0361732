"""The environments that ship with the project, and the catalogue that finds them."""
