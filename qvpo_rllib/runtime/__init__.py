"""RLlib algorithms as they are trained here: base class, configuration, evaluation, stops."""
