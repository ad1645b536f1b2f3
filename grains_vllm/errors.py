"""The errors that the plugin raises before an engine exists."""


class GrainsConfigError(ValueError):
    """A configuration that cannot be served; the message names the field, value and cure."""
