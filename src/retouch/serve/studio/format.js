/** Numbers as text. Everything the page shows goes through here, so that one figure reads alike everywhere. */

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** @param {number|null|undefined} value @returns {boolean} */
export const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? whole.format(value) : "–");

/** 0.0341 -> "34 ms", 1.25 -> "1.25 s", 90 -> "1 min 30 s". */
export function seconds(value) {
  if (!known(value)) return "–";
  if (value === 0) return "0 ms";
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

/** How long ago, in whole units. */
export const age = (value) => (value < 60 ? `${Math.max(0, Math.floor(value))} s` : seconds(value));

/** A share of 1 as per cent: one decimal under 10 %. */
export function percent(share) {
  if (!known(share)) return "–";
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value < 9.95 && value % 1 !== 0 ? value.toFixed(1) : Math.round(value)} %`;
}

export function bytes(value) {
  if (!known(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value < 10 && unit > 0 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** Dollars down to the smallest edit: two figures of whatever is there, never an exponent. */
export function dollars(value) {
  if (!known(value)) return "–";
  if (value === 0) return "$0";
  if (value >= 1) return `$${value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  const digits = Math.min(12, 1 - Math.floor(Math.log10(value)));
  return `$${value.toFixed(digits)}`;
}

/** A rate with as many decimals as it deserves. */
export const rate = (value) => (known(value) ? value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2) : "–");
