"""Data from one Gaussian, whose network is known exactly."""

from sit_composer.transport import Transport

MEAN, STD = 0.7, 0.4


def gaussian(tr: Transport):
    """The exact network for data ~ N(MEAN, STD²), whatever tr says that a network predicts."""

    def model(x, t):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        (alpha, d_alpha), (sigma, d_sigma) = tr.path.alpha(t), tr.path.sigma(t)
        variance = alpha**2 * STD**2 + sigma**2
        centred = (x - alpha * MEAN) / variance  # minus the score
        if tr.prediction == "score":
            return -centred
        if tr.prediction == "noise":
            return sigma * centred
        if tr.prediction == "x":
            return MEAN + alpha * STD**2 * centred
        return d_alpha * (MEAN + alpha * STD**2 * centred) + d_sigma * sigma * centred

    return model
