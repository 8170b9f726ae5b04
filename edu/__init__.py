"""The whole life of a small ChatGPT. See README.md for the map; import the modules, not this package."""
