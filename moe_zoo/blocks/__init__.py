"""Arrangements: how mixers, routers, dispatchers and banks make up a block of a network."""
