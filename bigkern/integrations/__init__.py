"""bigkern inside other libraries.  Each module imports its library when it is asked to, not before."""
