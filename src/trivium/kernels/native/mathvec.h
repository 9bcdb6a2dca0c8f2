// exp, tanh, erf and the activations built on them, sixteen lanes at a time, NaN in, NaN out.
#pragma once
#include "vec.h"

namespace trv {

enum Activation { kNone, kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kSigmoid, kTanh };

// e^x by x = n · ln 2 + r, a polynomial of degree 6 in r; below −87.3 the result is 0, above 88.7 infinity's neighbour.
TRV_INLINE vf vexp(vf x) {
  vf low = vset(-87.3f);
  x = vmin(vset(88.72f), x);
  vf clamped = vmax(low, x);
  vf n = vround(vmul(clamped, vset(1.44269504088896341f)));
  vf r = vfma(n, vset(-0.693359375f), clamped);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.3981999507e-3f);
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
  // 2^n in two factors: n reaches 128, and −126 at the bottom.
  vi half = vint(vmul(n, vset(0.5f)));
  vi rest = visub(vint(n), half);
  vf scale = vbits(vshl(viadd(half, viset(127)), 23));
  vf scale2 = vbits(vshl(viadd(rest, viset(127)), 23));
  vf result = vmul(vmul(p, scale), scale2);
  // Exact zero below the range: what a masked score must give.
#if TRV_AVX512
  return _mm512_mask_mov_ps(result, _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ), _mm512_setzero_ps());
#elif TRV_AVX2
  __m256 ma = _mm256_cmp_ps(x.a, low.a, _CMP_LT_OQ), mb = _mm256_cmp_ps(x.b, low.b, _CMP_LT_OQ);
  return {_mm256_andnot_ps(ma, result.a), _mm256_andnot_ps(mb, result.b)};
#else
  vf out;
  for (int i = 0; i < 4; i++) out.v[i] = (f4)(~(x.v[i] < low.v[i]) & (i4)result.v[i]);
  return out;
#endif
}

// 2^x for x <= 0, by a polynomial of degree 6 whose largest error is 2e-9: 1 at 0, and 0 below -126.5.
TRV_INLINE vf vexp2_falling(vf x) {
  x = vmax(x, vset(-127.0f));
  vf n = vround(x);
  vf r = vsub(x, n);
  vf p = vset(1.5353362029e-4f);
  p = vfma(p, r, vset(1.3398874651e-3f));
  p = vfma(p, r, vset(9.6184373591e-3f));
  p = vfma(p, r, vset(5.5503324705e-2f));
  p = vfma(p, r, vset(2.4022647914e-1f));
  p = vfma(p, r, vset(6.9314720286e-1f));
  p = vfma(p, r, vset(1.0f));
  return vmul(p, vbits(vshl(viadd(vint(n), viset(127)), 23)));
}

TRV_INLINE float exp1(float x) {
  float t[16];
  vstore(t, vexp(vset(x)));
  return t[0];
}

TRV_INLINE vf vsigmoid(vf x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

// Odd: small |x| by a polynomial, else 1 − 2 / (e^2x + 1).
TRV_INLINE vf vtanh(vf x) {
  vf a = vabs(x);
  vf large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(vexp(vmul(vset(2.0f), a)), vset(1.0f))));
  vf s = vmul(x, x);
  vf p = vset(-5.70498872745e-3f);
  p = vfma(p, s, vset(2.06390887954e-2f));
  p = vfma(p, s, vset(-5.37397155531e-2f));
  p = vfma(p, s, vset(1.33314422036e-1f));
  p = vfma(p, s, vset(-3.33332819422e-1f));
  vf small = vfma(vmul(p, s), a, a);
  vf sign = vbits(vand(vints(x), viset((int32_t)0x80000000)));
#if TRV_AVX512
  vf picked = _mm512_mask_mov_ps(large, _mm512_cmp_ps_mask(a, vset(0.625f), _CMP_LT_OQ), small);
  return _mm512_or_ps(picked, sign);
#elif TRV_AVX2
  vf edge = vset(0.625f);
  __m256 pa = _mm256_blendv_ps(large.a, small.a, _mm256_cmp_ps(a.a, edge.a, _CMP_LT_OQ));
  __m256 pb = _mm256_blendv_ps(large.b, small.b, _mm256_cmp_ps(a.b, edge.b, _CMP_LT_OQ));
  return {_mm256_or_ps(pa, sign.a), _mm256_or_ps(pb, sign.b)};
#else
  vf out;
  for (int i = 0; i < 4; i++) {
    f4 picked = pick(a.v[i] < 0.625f, small.v[i], large.v[i]);
    out.v[i] = (f4)((i4)picked | (i4)sign.v[i]);
  }
  return out;
#endif
}

// erf by the five-term formula 7.1.26 of Abramowitz and Stegun, error below 1.5e-7.
TRV_INLINE vf verf(vf x) {
  vf a = vabs(x);
  vf t = vdiv(vset(1.0f), vfma(vset(0.3275911f), a, vset(1.0f)));
  vf p = vset(1.061405429f);
  p = vfma(p, t, vset(-1.453152027f));
  p = vfma(p, t, vset(1.421413741f));
  p = vfma(p, t, vset(-0.284496736f));
  p = vfma(p, t, vset(0.254829592f));
  p = vmul(p, t);
  vf y = vsub(vset(1.0f), vmul(p, vexp(vsub(vzero(), vmul(a, a)))));
  vi sign = vand(vints(x), viset((int32_t)0x80000000));
  return vbits(viadd(vints(y), sign));  // y >= 0: adding the sign bit sets it
}

TRV_INLINE vf activate(int kind, vf x) {
  switch (kind) {
    case kSilu: return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), x))));
    case kGelu: return vmul(vmul(vset(0.5f), x), vadd(vset(1.0f), verf(vmul(x, vset(0.70710678118654752f)))));
    case kGeluTanh: {
      vf inner = vmul(vset(0.7978845608028654f), vfma(vmul(vmul(x, x), x), vset(0.044715f), x));
      return vmul(vmul(vset(0.5f), x), vadd(vset(1.0f), vtanh(inner)));
    }
    case kQuickGelu: return vmul(x, vsigmoid(vmul(vset(1.702f), x)));
    case kRelu: return vmax(vzero(), x);
    case kRelu2: {
      vf r = vmax(vzero(), x);
      return vmul(r, r);
    }
    case kSigmoid: return vsigmoid(x);
    case kTanh: return vtanh(x);
    default: return x;
  }
}

}  // namespace trv
