"""The verbs of `babl`, each with its parser beside it; what a verb needs is imported when it is called."""
