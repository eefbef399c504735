"""The commands of ``narrowdeep``: one file each, registered in ``narrowdeep.cli``."""
