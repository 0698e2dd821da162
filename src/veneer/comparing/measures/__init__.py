"""Measures: what is told of an arm beside its score: costs, calibration, groups, other data, forgetting."""
