"""The RETRO model: modules that take a config and arrays, and know nothing else of ours."""
