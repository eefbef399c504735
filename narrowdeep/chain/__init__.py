"""A chain of layers, cut anywhere: its records, its families, its one graph node, its checkpoint schedules."""
