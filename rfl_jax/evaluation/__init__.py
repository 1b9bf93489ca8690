"""Judging videos: measures of a clip, comparisons of many, and the alarm while training runs."""
