"""Cohorts: several adapters trained together over one frozen base, each as if alone."""
