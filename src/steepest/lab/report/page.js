// Draws the figures over their static images. If this cannot run, the images stay.
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hover = { name: "hover", select: { type: "point", nearest: true, on: "pointerover", clear: "pointerout" } };

  for (const [key, spec] of Object.entries(plots)) {
    const figure = document.getElementById(key);
    const place = figure.querySelector(".plot");
    const without = (...names) => { spec.layer = spec.layer.filter(({ name }) => !names.includes(name)); };
    figure.classList.add("drawn");
    if (spec.usermeta.keyed || spec.usermeta.room > place.clientWidth / 3) { // no room for names beside the curves
      figure.classList.add("keyed");
      without("names", "key");
    }
    if (place.clientWidth < 480) without("zone"); // it is in the caption, too
    for (const points of spec.layer.filter(({ name }) => name === "points")) points.params = [hover];
    const font = getComputedStyle(document.body).fontFamily;
    const options = { actions: false, ast: true, renderer: "svg", config: { font }, tooltip: { theme: "custom" } };
    vegaEmbed(place, spec, options).then(({ view }) => {
      const paint = () => view.signal("dark", dark.matches).runAsync();
      dark.addEventListener("change", paint);
      return paint();
    }).catch((problem) => {
      figure.classList.remove("drawn", "keyed");
      console.error(problem);
    });
  }
})();
