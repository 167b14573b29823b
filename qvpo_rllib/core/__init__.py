"""QVPO's mathematics. Imports torch and numpy only, never Ray or Gymnasium."""
