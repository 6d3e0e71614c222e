"""Extractors: pure functions Tree -> training rows. Models, files and rounds are none of their business."""
