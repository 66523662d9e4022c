"""Runs drjax programs as Apache Beam pipelines. Nothing is here yet."""
