"""Recognisers: one per concept, every exporter's spelling in one place. They never mutate."""
