"""Methods that change a model without changing what it computes, so that later stages lose less."""
