/* Elementary functions in double, our own: the same bits on every machine and with every C library.
 *
 * Everything below uses only +, -, *, /, fma and bit moves, all exact IEEE operations rounded to
 * nearest, so gcc and clang agree on every bit as long as contraction is off (-ffp-contract=off).
 * fma may come from the instruction or from libm's exact emulation: link with -lm where the target
 * lacks it.
 *
 * Errors against the true value (tested at these bounds, in units in the last place of a normal
 * result): 1 for exp, log, sin, cos and pow; 3 for tanh.
 *
 * NaN in, NaN out; infinities and overflow as in C's math.h. No errno, no floating-point exceptions
 * promised. Thread-safe, never blocks.
 */
#ifndef HS_CORE_MATH_H
#define HS_CORE_MATH_H

double hs_exp(double x);
double hs_log(double x); /* x = 0: -inf; x < 0: NaN */
double hs_tanh(double x);
double hs_sin(double x); /* |x| < 2^30; beyond it NaN, never a wrong number */
double hs_cos(double x); /* as hs_sin */
double hs_pow(double x,
              double y); /* x >= 0; x < 0: NaN, also for whole y (nothing here needs it) */

#endif
