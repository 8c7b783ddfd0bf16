"""Attention patterns of every head: statistics, roles, insights and advice."""
