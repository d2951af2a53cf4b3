"""Settings of a run: what they are (``schema``), named model sizes (``presets``), reading and writing (``load``)."""
