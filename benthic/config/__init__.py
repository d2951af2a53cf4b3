"""Settings of a run: what they are (``schema``), named model sizes (``presets``), recipes and ``--set`` read and written
(``load``), mistakes in them told (``complain``), and the stages that a run is made of (``stages``).
"""
