"""Judging videos: figures of a clip, comparisons of many, and the alarm while training runs."""
