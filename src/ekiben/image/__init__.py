"""From a Bento to a container image: its recipe, what is installed in it, and its bill of materials."""
