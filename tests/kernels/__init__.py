"""Tests of the numerical operations."""
