"""Settings of a run: what they are (``schema``), named sizes of models (``presets``), recipes and ``--set`` (``load``),
mistakes in them told (``complain``), and the stages that a run is made of (``stages``).
"""
