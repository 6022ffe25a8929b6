"""The stages of a step, each as a transformation of its own."""
