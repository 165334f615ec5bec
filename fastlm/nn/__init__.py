"""Layers built from fastlm's ops."""
