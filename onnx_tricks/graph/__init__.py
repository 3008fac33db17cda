"""ONNX in and out, queries and edits; no trick is known here."""
