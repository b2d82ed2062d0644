// The exponentials of a softmax, the norm, and the bandwidth probe. A part of kernels_body.h.

// Cody-Waite reduction to |r| <= ln(2) / 2 and a Taylor polynomial of degree 7: within 2 units in the last place.
INLINE vf Exp(vf x) {
  const vf lowest = Splat(-87.0f);
  const vu under = (vu)(x < lowest);
  x = (vf)(((vu)lowest & under) | ((vu)x & ~under));
  const vf shift = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf whole = (x * 1.44269504f + shift) - shift;
  const vf r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  vf y = Splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const vf power = (vf)((__builtin_convertvector(whole, vi) + 127) << 23);
  return (vf)((vu)(y * power) & ~under);
}

INLINE float Largest(const float* p, int64_t n) {
  constexpr int kSums = 4;  // no comparison waits for the one before
  vf best[kSums];
  UNROLL
  for (int s = 0; s < kSums; ++s) best[s] = Splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    UNROLL
    for (int s = 0; s < kSums; ++s) {
      const vf value = Load<vf>(p + i + s * kLanes);
      best[s] = value > best[s] ? value : best[s];
    }
  }
  UNROLL
  for (int s = 1; s < kSums; ++s) best[0] = best[s] > best[0] ? best[s] : best[0];
  float largest = Max(best[0]);
  for (; i < n; ++i) largest = p[i] > largest ? p[i] : largest;
  return largest;
}

KERNEL float Exponentiate(float* p, int64_t n, float* max) {
  const float largest = Largest(p, n);
  *max = largest;
  if (largest == -__builtin_inff()) {
    float total = 0;
    for (int64_t i = 0; i < n; ++i) total += p[i] = p[i] == largest ? 0 : p[i];  // NaN stays
    return total;
  }
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf value = Exp(Load<vf>(p + i) - largest);
    Store(p + i, value);
    sum += value;
  }
  if (i < n) {
    float tail[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) tail[l] = i + l < n ? p[i + l] : -__builtin_inff();
    const vf value = Exp(Load<vf>(tail) - largest);
    sum += value;
    Store(tail, value);
    memcpy(p + i, tail, (n - i) * sizeof(float));
  }
  return Sum(sum);
}

KERNEL void RmsNorm(const float* x, int64_t n, const float* scale, float eps, float* out) {
  constexpr int kSums = 4;  // no addition waits for the one before
  vf sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    UNROLL
    for (int s = 0; s < kSums; ++s) {
      const vf value = Load<vf>(x + i + s * kLanes);
      sums[s] += value * value;
    }
  }
  for (; i < n; i += kLanes) {
    float tail[kLanes] = {};
    memcpy(tail, x + i, (n - i < kLanes ? n - i : kLanes) * sizeof(float));
    const vf value = Load<vf>(tail);
    sums[0] += value * value;
  }
  const float mean = Sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / n;
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    Store(out + i, Load<vf>(x + i) * factor * Load<vf>(scale + i));
  }
  for (; i < n; ++i) out[i] = x[i] * factor * scale[i];
}

KERNEL uint64_t Read(const void* data, int64_t bytes) {
  const uint8_t* from = static_cast<const uint8_t*>(data);
  vu sums[kRowsAtOnce] = {};
  int64_t at = 0;
  for (; at + kRowsAtOnce * kBytes <= bytes; at += kRowsAtOnce * kBytes) {
    __builtin_prefetch(from + at + 4096, 0, 2);
    UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) sums[r] ^= Load<vu>(from + at + r * kBytes);
  }
  uint32_t lanes[kLanes];
  Store(lanes, sums[0] ^ sums[1] ^ sums[2] ^ sums[3]);
  uint64_t result = 0;
  for (int l = 0; l < kLanes; ++l) result += lanes[l];
  for (; at < bytes; ++at) result += from[at];
  return result;
}
