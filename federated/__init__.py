"""Federated learning in rounds of clients, written with drjax. Nothing is here yet."""
