"""Model families, one file each, with what the front end and the engine need of a family."""
