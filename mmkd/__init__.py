"""mmkd distils a large vision-language model into a tiny one."""

__version__ = "0.1.0"
