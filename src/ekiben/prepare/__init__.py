"""Rows cleaned, divided and made into features, and the profile that monitoring will compare with."""
