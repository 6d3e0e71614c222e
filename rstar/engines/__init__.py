"""Text engines behind two protocols: `base.Policy` and `base.Scorer`."""
